"""Search spaces: genotypes, their operators, and how they become torch modules."""
