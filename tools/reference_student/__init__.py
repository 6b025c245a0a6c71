"""The reference student: how it was trained, distilled, quantised, judged and packed (see README.md)."""
