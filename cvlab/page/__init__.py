"""What the page shows: questions, answers and their HTML, without gradio, which only app.py imports."""
