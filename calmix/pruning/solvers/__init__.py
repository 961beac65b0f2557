"""Pure solvers: tensors in, tensors out, independent of models, methods and command lines."""
