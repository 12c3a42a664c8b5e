"""Other implementations, run as black boxes and traced under our names. Nothing else in the package imports them."""
