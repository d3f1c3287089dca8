"""What the makefile runs that is not part of the library."""
