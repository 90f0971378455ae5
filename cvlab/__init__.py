"""The library under cvlab's training scripts and page: functions of images and tensors.

Nothing in here imports gradio or argparse, and nothing holds a loop over epochs.
"""
