"""data set -> weights: what each stage minimises, and the one loop that trains them all."""
