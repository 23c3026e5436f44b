"""Plain torch and torch.distributed implementations: the oracle of the tests and the fallback everywhere."""
