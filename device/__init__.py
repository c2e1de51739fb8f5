"""The edge device: holds a slice of the experts, runs them on the rows it is sent, returns weighted sums."""
