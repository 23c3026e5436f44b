"""The functional operations: schema, fake, checks and choice of implementation, one file per operation."""
