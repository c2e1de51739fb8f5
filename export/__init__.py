"""The exporter: cuts a checkpoint into the stages of the base station and the experts of each device."""
