"""What the site makes of the sources at every build, so that it cannot go stale."""
