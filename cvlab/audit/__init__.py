"""Does a model cheat? Marks that go with a class: proposed by statistics of pictures, proved on the model."""
