"""Damage, as strangers, bad links and bad disks do it. Used by tests/test_fuzz.py and scripts/bench/fuzz.py.

`lawful` is docs/protocol.md once more, written without the code that it checks: plain values, no structs. A frame is
*accepted* if it was acted upon though it must not be: a message that is not lawful was understood; a stranger's
message, lawful or not, changed who is connected or what a run answers; a device's duplicate, replayed or foreign reply
changed what a run answers; a device ran what it does not hold. NOTE: a lawful message with other numbers in it than its
sender wrote is what encryption protects from (a damaged byte ends the connection), not what decoding can see.
"""
