"""A plugin of somebody else: a splitter at quantiles, and nn.Bilinear as a layer type."""
