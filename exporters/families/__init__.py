"""Model families: thin wrappers that make the libraries' own modules exportable."""
