"""Matmul whose K is cut into leaves that meet in one binary tree."""
