"""Host side: a delivery package in, verified device artifacts out; needs torch."""
