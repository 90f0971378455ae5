"""What a training needs beside its model: optimizers, schedules, losses, features of a frozen backbone."""
