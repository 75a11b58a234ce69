"""How the hot operations are computed: one folder per operation, one table of implementations each."""
