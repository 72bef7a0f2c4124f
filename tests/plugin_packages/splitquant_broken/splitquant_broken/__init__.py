"""A plugin that breaks when it is imported, as one does whose dependency was upgraded."""

raise RuntimeError("this plugin was made for another version")
