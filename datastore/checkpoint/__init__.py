"""Training state that is there whole or not at all: saved in parts, committed by one file, verified before it is loaded."""
