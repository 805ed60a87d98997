"""Where graded groups come from: sampling on the spot, filtering, recordings; evaluation."""
