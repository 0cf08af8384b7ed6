"""A converted model on the Hub."""
