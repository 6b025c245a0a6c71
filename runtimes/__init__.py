"""The device side: opens a bundle and runs it with numpy and one vendor runtime, never torch (torch_.py apart)."""
