"""The guarantee measured by someone else: plain automatic differentiation of the user's network.

Nothing here may import what it judges (``jacobian``, ``constraints``, ``solvers``, ``fit``, ``certificate``,
``posterior``): a mistake in the rows must not be able to hide itself.
"""
