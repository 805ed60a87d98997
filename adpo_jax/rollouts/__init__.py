"""Sources of graded groups: sampling on the spot, filtering, recordings; and evaluation."""
