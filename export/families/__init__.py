"""Model families: what a checkpoint of each type is called inside, one short file each."""
