// Marks tables and pictures that are wider than their frame; the style sheet writes a hint above them.
const frames = () => document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset p:has(> img)");
const mark = () => frames().forEach((frame) => frame.classList.toggle("scrolls", frame.scrollWidth > frame.clientWidth + 1));
addEventListener("load", mark);
addEventListener("resize", mark);
