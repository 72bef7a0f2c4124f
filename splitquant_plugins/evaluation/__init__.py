"""What a split gains: metrics, comparisons, inspections of layers, tables and pictures."""
