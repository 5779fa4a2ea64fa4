"""Rollouts of the training steps: when and with which policy they are collected, and metrics."""
