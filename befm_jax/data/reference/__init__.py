"""Small published figures that stand in where a user brings no data; each names its source."""
