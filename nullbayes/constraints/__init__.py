"""The question that is asked, what is preserved, and the rows that training data give."""
