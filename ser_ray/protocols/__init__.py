"""How utterances are split into train, dev and test (folds), and the audit for leakage between them."""
