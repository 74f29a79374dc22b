"""`fastattn demo`: a real pretrained model before and after `fastattn.swap`, checked and timed."""
