"""The maths of a conversion: tensors in, factors out. Knows no files and no names of checkpoints."""
