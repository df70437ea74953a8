"""Target side of int8pass: knows operators and devices, never graphs or models."""
