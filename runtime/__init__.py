"""What base station and devices share: messages, links, clock, engines, the bundle's manifest, errors."""
