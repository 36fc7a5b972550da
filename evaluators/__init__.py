"""From genotype to metrics: training, costs, latency, data sets."""
