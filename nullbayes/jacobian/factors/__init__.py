"""Rows in the shape in which layers give them, and products with them."""
