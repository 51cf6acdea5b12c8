"""The network that scores what a noisy token was, its named sizes, and weights from other implementations."""
