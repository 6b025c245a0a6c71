"""Where the shipped student lies, and how one variant becomes a complete delivery package folder."""

from exporters.reference import DATA as SHIPPED
from exporters.reference import VARIANTS, assemble

__all__ = ["SHIPPED", "VARIANTS", "assemble"]
