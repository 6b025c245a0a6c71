"""Device side: numpy and one vendor runtime; never torch (`torch_` apart)."""
