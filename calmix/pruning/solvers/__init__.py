"""Pure solvers: tensors in, tensors out; they know no models, methods or command lines."""
