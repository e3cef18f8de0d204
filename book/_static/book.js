"use strict";
// A block that scrolls can be scrolled with the keyboard, too.
addEventListener("DOMContentLoaded", () =>
  document.querySelectorAll(".highlight pre").forEach((block) => { block.tabIndex = 0; }));
