"""The documentation site: `make docs`. Pages are *.md; what is made of the sources, `_generate`."""
