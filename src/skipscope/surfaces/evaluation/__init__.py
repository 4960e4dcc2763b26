"""From points of a plane to losses: the plain loop, and faster strategies."""
