"""Your agents: one file or folder each. Every `Agent` defined here is served under its name."""
