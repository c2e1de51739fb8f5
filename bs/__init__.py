"""The base station: attention, router and head; decides which device works on which token."""
