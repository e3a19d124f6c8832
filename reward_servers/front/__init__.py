"""HTTP front of a reward server: a protocol on llhttp that decides at a request's head, before anything is read."""
