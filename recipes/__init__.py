"""How what comes with the package was made; not part of it. Run from a checkout."""
