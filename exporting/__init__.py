"""Write trained models in the formats of other programs, and check that they compute the same."""
