"""What a user can get wrong: the catalogue of faults, the tests that provoke each, and docs/faults.md made from it."""
