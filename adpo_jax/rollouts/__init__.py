"""Sources of graded groups: sampled on the spot, filtered, ahead of the update, from samplers
elsewhere, from recordings; and evaluation."""
